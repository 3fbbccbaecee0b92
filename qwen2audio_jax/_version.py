"""Version of the package, by itself: those who need it alone import nothing else."""

__version__ = "0.2.0"
