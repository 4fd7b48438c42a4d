"""News of results that come after their keeper has nothing left to do."""

import os
import subprocess
import sys
from pathlib import Path


def test_news_of_the_last_results_reaches_rank_0():
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_mapby": ":oversubscribe",
    }
    script = Path(__file__).with_name("late_news.py")
    done = subprocess.run(
        ["mpiexec", "-n", "2", sys.executable, str(script)], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
