"""Raw data of each kind: one module a source, each giving the same `Source` to `segfleet.ingest`."""
