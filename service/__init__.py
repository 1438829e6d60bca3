"""The gRPC service: request bytes -> servicer -> batcher -> engine -> rows back to their callers."""
