"""What a cache, admission and ChatAegis change on this machine, measured before and after in one run."""
