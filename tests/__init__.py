"""Tests of qerve; helpers shared by several of them live in ``tests.support``."""
