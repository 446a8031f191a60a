# CPU:         docker build -t fmjax .
# NVIDIA GPU:  docker build -t fmjax --build-arg EXTRAS=gpu .     and run it with --gpus all
# Runs and prepared data live in the volume /data: docker run -v $PWD/data:/data fmjax --config=configs/mlm.py
FROM python:3.11-slim
ARG EXTRAS=""
COPY . /fmjax
RUN pip install --no-cache-dir "/fmjax[${EXTRAS}]"
ENV FMJAX_CACHE=/data/cache
WORKDIR /data
ENTRYPOINT ["fmjax"]
