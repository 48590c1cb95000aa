"""An arm of six joints: its forward kinematics with slopes, inverse kinematics, and switching between the two."""
