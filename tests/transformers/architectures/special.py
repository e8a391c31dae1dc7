"""What the generic way cannot know: values of configurations, by the model type that their file declares."""

#: model_type -> values over the shrunk ones (a dict goes into the part of that name).
CONFIGURATIONS = {}
