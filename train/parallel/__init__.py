"""Training of one dictionary by several processes, each with some of its virtual shards."""
