"""The mathematics that must be fast: plain arrays in, plain arrays out; no DIALS, no MPI, no I/O."""
