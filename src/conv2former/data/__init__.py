"""What all tasks share: image files to pixels, keyed random numbers, loading."""
