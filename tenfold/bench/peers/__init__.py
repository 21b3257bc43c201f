"""Engines that Tenfold is compared with, each under the interface of `bench/engines.py`. None is needed to run it."""
