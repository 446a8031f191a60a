"""A package of somebody else: data, an objective and a source that a config of fmjax names."""
