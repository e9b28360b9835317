"""Images in, batches out: safe decoding, keyed sampling, labelled images."""
