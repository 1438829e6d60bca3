"""The code that protoc generates from proto/*.proto (`make proto`).

Its messages have a descriptor pool of their own. The clients of KServe, MLServer and Triton define the same `inference.*` messages,
and a pool accepts each message only once; this way their code and ours work in one process.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
