"""Questions: files, hub data sets and generated tasks -> rows -> prompts."""
