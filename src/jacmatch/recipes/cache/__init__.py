"""`jacmatch cache`: a teacher's answers on disk, for `jacmatch distill --cache`.

`source` asks the teacher what a training will ask it, `building` writes the answers, `checking` asks again.
"""
