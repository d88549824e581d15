"""A serving step: a batch in which each request has its own parameters."""

from fastlogits.serving.accepted import Accepted as Accepted
from fastlogits.serving.batch import BatchProcessor as BatchProcessor
from fastlogits.serving.params import RequestParams as RequestParams
