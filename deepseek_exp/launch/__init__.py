"""Start the processes of a job, on this machine or on several."""
