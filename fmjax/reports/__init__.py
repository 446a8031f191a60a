"""Reports: the pages and figures of runs."""
