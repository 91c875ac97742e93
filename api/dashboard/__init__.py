"""The pages for people: jobs, queue, data sets, comparison, settings. They read by the functions of the API."""
