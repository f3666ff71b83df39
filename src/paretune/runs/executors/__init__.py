"""Executors: this process, worker processes of this machine, a Ray cluster; or one training in several processes."""
