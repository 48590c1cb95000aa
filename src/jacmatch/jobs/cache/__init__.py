"""`jacmatch cache`: a teacher's answers on disk, for `jacmatch distill --cache`.

`source` asks the teacher what a training will ask it, `building` and `writing` put the answers on disk, and
`checking` asks again.
"""
