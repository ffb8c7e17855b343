"""Devices: the mesh, and where each logical axis goes on it."""
