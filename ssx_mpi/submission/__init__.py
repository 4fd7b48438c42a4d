"""Jobs for a batch system: scripts made from one set of blocks, and what to ask of the system for them."""
