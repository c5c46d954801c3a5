"""docs/api.md, made of the service's OpenAPI document: `make api-docs`."""
