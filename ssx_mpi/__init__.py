"""Serial crystallography stills to merged intensities, over any number of MPI ranks."""

__version__ = "0.1.0"
