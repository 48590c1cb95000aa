"""Three fingers that hold an object: as a hand, as a parallel manipulator, and the pose as a function of the joints."""
