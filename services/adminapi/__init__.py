"""The qubesd wire protocol: requests in, replies and event streams out."""
