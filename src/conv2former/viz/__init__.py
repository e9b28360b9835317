"""Drawing: curves and tables, and results on images."""
