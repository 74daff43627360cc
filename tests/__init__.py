"""A folder for each room of the package. Folders are no packages: as on a path, `deepspeed` would hide the real one."""
