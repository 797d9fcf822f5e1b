"""Data: the LeRobot source, the grain loader, and the demo's simulator. Import the modules by name."""
