"""Teacher caches on disk: written once, read by any number of students.

`format` has the files, their contents and the fingerprints of teacher and query; `writer` writes them, and `reader`
reads them and has the teacher that answers from disk.
"""

from jacmatch.teachers.cached.reader import CachedTeacher

__all__ = ["CachedTeacher"]
