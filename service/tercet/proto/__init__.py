"""The wire contracts, and the code that protoc generates from them (`make proto`).

Our messages live in a descriptor pool of their own: KServe's, MLServer's and Triton's clients bring the same `inference.*` messages
in files of other names, and one pool takes each message once. So our code and theirs can be used in one process.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
