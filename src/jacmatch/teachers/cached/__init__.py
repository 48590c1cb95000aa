"""A teacher's answers on disk: written once, read by any number of students.

`layout` says what lies where, `shards` reads it, `entries` turns answers into rows, `fingerprint` says for
whom they are, and `teacher` is the teacher that gives them.
"""

from jacmatch.teachers.cached.teacher import CachedTeacher

__all__ = ["CachedTeacher"]
