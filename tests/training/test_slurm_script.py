"""recipes/slurm.sbatch with a Slurm that is but two small programs: where it asks the run to save and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sbatch"
SRUN = """#!/bin/bash
[ -e "$RUN/save_quit" ] && { echo "a request of an earlier job was left"; exit 3; }
echo "$SRUN_CPUS_PER_TASK $*"
touch "$RUN/started"
while [ ! -e "$RUN/save_quit" ]; do sleep 0.05; done
echo "saved and ended"
"""


def test_the_signal_asks_the_run_that_the_flags_name(tmp_path: Path) -> None:
    """Neither a directory that is not there yet nor a request that was left behind is in its way."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho node1\necho node2\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "c.toml").write_text(
        '[model]\nfamily = "wan"\n[run]\ndir = "of-the-file"\n[[data.sources]]\npath = "clips"\n[training]\nsteps = 1\n'
    )
    run = tmp_path / "runs" / "of-the-flag"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "96", "PYTHONPATH": str(SCRIPT.parents[1] / "src"),
    }  # fmt: skip
    command = ["bash", str(SCRIPT), "c.toml", "--optimizer.lr", "1e-4", f"--run.dir={run}", "--reset-lr"]

    for _ in range(2):  # the second finds the first one's request
        job = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 60
        while not (run / "started").exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
        assert said.startswith("96 --kill-on-bad-exit=1 bash -c") and said.endswith("saved and ended\n")
        assert "node1 c.toml --optimizer.lr 1e-4" in said
        assert (run / "save_quit").exists() and not (tmp_path / "of-the-file").exists()
        (run / "started").unlink()
