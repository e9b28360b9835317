"""Pictures in, batches out: safe decoding, keyed sampling, labelled images."""
