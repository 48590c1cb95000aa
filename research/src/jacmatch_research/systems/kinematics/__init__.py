"""An arm of six joints: its forward kinematics with derivatives, inverse kinematics, and switching between the two."""
