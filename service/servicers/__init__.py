"""The faces of the service, one module a .proto file. A method has three lines: decode, infer, encode."""
