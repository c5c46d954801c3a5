"""The wire formats of the endpoints that we meter, without any I/O."""
