"""Teacher caches on disk: written once, read by any number of students.

`format` has the files and their contents, `writer` writes them, `shards` reads them, `fingerprint` identifies the
teacher and the query, and `teacher` is the teacher that answers from disk.
"""

from jacmatch.teachers.cached.reader import CachedTeacher

__all__ = ["CachedTeacher"]
