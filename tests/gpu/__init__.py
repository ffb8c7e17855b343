"""What only a GPU can show: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""
