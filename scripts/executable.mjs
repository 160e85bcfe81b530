// In a checkout `npx qlora-node` shall run what was built here. The compiler writes plain files, and without a link of
// its own npx would install the folder, and so build it, once more.
import { chmodSync, mkdirSync, rmSync, symlinkSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const path = (name) => fileURLToPath(new URL(`../${name}`, import.meta.url));

chmodSync(path('dist/lib/cli/main.js'), 0o755);
mkdirSync(path('node_modules/.bin'), { recursive: true });
const link = path('node_modules/.bin/qlora-node');
rmSync(link, { force: true });
symlinkSync('../../dist/lib/cli/main.js', link);
