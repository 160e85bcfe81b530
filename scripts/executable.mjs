// What package.json's bin names is run by name in a checkout too; the compiler writes plain files.
import { chmodSync } from 'node:fs';

chmodSync(new URL('../dist/lib/cli/main.js', import.meta.url), 0o755);
