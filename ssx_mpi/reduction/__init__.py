"""From integrated crystals to merged intensities, the crystals spread over the ranks."""
