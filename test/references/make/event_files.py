"""Reads the event files of a folder with TensorBoard's own reader and writes what it saw to expected.json there.

    node dist/test/support/tensorboard-events.js test/references/tensorboard
    venv/bin/python make/event_files.py tensorboard      (pip install tensorboard)
"""

import json
import math
import pathlib
import sys

import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

folder = pathlib.Path(sys.argv[1])
reader = EventAccumulator(str(folder), purge_orphaned_data=True)
reader.Reload()
scalars = {
    tag: [[e.wall_time, e.step, None if math.isnan(e.value) else e.value] for e in reader.Scalars(tag)]
    for tag in sorted(reader.Tags()["scalars"])
}
seen = {"tensorboard": tensorboard.__version__, "scalars": scalars}
(folder / "expected.json").write_text(json.dumps(seen, indent=1) + "\n")
print(json.dumps(seen))
