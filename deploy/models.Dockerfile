# The trained models as an image, for `volumes: image:` in Kubernetes and `oci://` in KServe:
#   docker build -f deploy/models.Dockerfile -t registry.example.com/tercet-models:0.1.0 .
# models.Dockerfile.dockerignore, which BuildKit reads, lets only the cards and the ONNX files through.
FROM busybox:1.37
COPY --chown=10001:10001 models /models
USER 10001
