"""Active appearance models: faces with landmarks from a generator, a model of shape and texture, and ways to fit it."""
