"""Work spread over processes and machines: tasks by name, results by the digest of their inputs."""
