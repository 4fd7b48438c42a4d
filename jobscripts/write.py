"""Writes the job scripts of this folder, from the blocks that ssx_mpi.submit uses: python jobscripts/write.py"""

from pathlib import Path

from ssx_mpi.submission.scripts import KINDS, Site, render

for kind in KINDS:
    path = Path(__file__).parent / f"{kind}.sh"
    path.write_text(render(kind, Site(nodes=2 if kind == "many_nodes" else 1)))
    path.chmod(0o755)
