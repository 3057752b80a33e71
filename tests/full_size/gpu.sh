#!/usr/bin/env bash
# The measurements that docs/performance.md and docs/serving.md ask of H200s, in calls of at most ten minutes.
#
#     OUT=folder bash tests/full_size/gpu.sh two       # float8, a small GPU's change of prompt, one video on both GPUs
#     OUT=folder bash tests/full_size/gpu.sh viewers   # a server with the tiny decoder and at 720p; batches of sessions
#     OUT=folder bash tests/full_size/gpu.sh full      # the full decoder: one video on both GPUs, and a server
#     OUT=folder bash tests/full_size/gpu.sh flat      # 1,000 chunks and 200 sessions
#     OUT=folder bash tests/full_size/gpu.sh passes    # two passes a chunk for five, at 480p and 720p
#     OUT=folder bash tests/full_size/gpu.sh many      # one video on all GPUs, training on all, a server on each of four
#
# All want two GPUs, many four or eight. Where each has work of its own, it has its share of the CPUs too, as if it were
# a machine of one.
# Each step has a time limit of its own, and what it wrote is in OUT/results.tgz, whichever came last. Random weights.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=/tmp/results
mkdir -p "$results" "${OUT:?a folder for results.tgz}"
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1
cache=/tmp/hub
own=configs/sana_video_config/Sana_2000M_480px_adamW_fsdp_longsana.yaml
model=hf://Efficient-Large-Model/SANA-Video_2B_480p_LongLive/checkpoints/SANA_Video_2B_480p_LongLive.pth
film=(--txt_file=asset/samples/video_prompts_samples.txt --cfg_scale=1.0 --num_frames 961 sampling.cuda_graphs=true)
minute=(--config="$own" --model_path="$model" "${film[@]}")
tiny=(--decoder taew2_1 --decoder_path seeded:0)
float8=(model.float8=true)
gpus=2

# step NAME SECONDS COMMAND...: run it, with its words in NAME.log, and pack what there is.
step() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1
  echo "$name: status $?, $((SECONDS - began)) s, at $SECONDS s"
  tail -n 25 "$results/$name.log"
  tar czf "$OUT/results.tgz" -C "$results" .
}

# share GPU NAME SECONDS SCRIPT...: a step on one of the GPUs, and its share of the CPUs.
share() {
  local gpu=$1 name=$2 limit=$3 cpus
  shift 3
  cpus=$(($(nproc) / gpus))
  CUDA_VISIBLE_DEVICES=$gpu HF_HUB_CACHE=$cache \
    step "$name" "$limit" taskset -c "$((gpu * cpus))-$((gpu * cpus + cpus - 1))" "$python" "$@"
}

benchmark() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" env HF_HUB_CACHE="$cache" "$python" inference_video_scripts/benchmark.py "${minute[@]}" \
    --out "$results/$name.json" "$@"
}

together() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" env HF_HUB_CACHE="$cache" "$python" -m torch.distributed.run --nproc_per_node="$gpus" \
    inference_video_scripts/benchmark.py --gpus_per_video "$gpus" "${minute[@]}" --out "$results/$name.json" "$@"
}

case ${1:-} in
two)
  CUDA_VISIBLE_DEVICES=1 step scores 300 "$python" tests/full_size/measure_float8.py scores --seconds 5 30 --batch 32 \
    --out "$results/float8" &
  CUDA_VISIBLE_DEVICES=0 step cache 150 "$python" tests/full_size/hub_cache.py "$cache" --no_base
  CUDA_VISIBLE_DEVICES=0 benchmark full_float8 110 "${float8[@]}"
  CUDA_VISIBLE_DEVICES=0 benchmark tiny_float8 80 "${tiny[@]}" "${float8[@]}"
  CUDA_VISIBLE_DEVICES=0 step change 90 "$python" tests/full_size/measure_memory.py --cache "$cache" \
    --out "$results/memory.json" --only "a change"
  wait
  together two_tiny_float8 70 "${tiny[@]}" "${float8[@]}"
  step peers 110 "$python" -m pytest -q -m gpu tests/models/test_peers.py
  ;;
viewers)
  CUDA_VISIBLE_DEVICES=0 step cache 150 "$python" tests/full_size/hub_cache.py "$cache" --no_base
  {
    share 0 viewers_tiny 400 tests/full_size/measure_load.py --cache "$cache" --out "$results/tiny.json" --only taew2_1
    share 0 batch 120 tests/full_size/measure_batch.py --out "$results/batch.json"
  } &
  cache=/tmp/hub720
  share 1 cache720 150 tests/full_size/hub_cache.py "$cache" --size 720
  share 1 viewers720 400 tests/full_size/measure_load.py --cache "$cache" --out "$results/720.json" --only 720p
  wait
  ;;
full)
  CUDA_VISIBLE_DEVICES=0 step cache 150 "$python" tests/full_size/hub_cache.py "$cache" --no_base
  together two_full 90
  together two_full_float8 80 "${float8[@]}"
  share 1 viewers_full 400 tests/full_size/measure_load.py --cache "$cache" --out "$results/full.json" --only "480p, full"
  ;;
flat)
  CUDA_VISIBLE_DEVICES=0 step cache 150 "$python" tests/full_size/hub_cache.py "$cache" --no_base
  share 0 flat 450 tests/full_size/measure_flat.py --config "$own" --model_path "$model" --out "$results/flat.json" \
    sampling.chunk_frames=3 vae.decoder=taew2_1 vae.decoder_pretrained=seeded:0 sampling.cuda_graphs=true
  ;;
passes)
  # passes GPU NAME SIZE MODEL SETTING...: a minute in two passes a chunk.
  passes() {
    local gpu=$1 name=$2 config=configs/sana_video_config/Sana_2000M_$3px_longsana_2step.yaml model=$4
    shift 4
    share "$gpu" "$name" 90 inference_video_scripts/benchmark.py --config="$config" --model_path="$model" "${film[@]}" \
      --out "$results/$name.json" "$@"
  }
  {
    share 0 cache 150 tests/full_size/hub_cache.py "$cache" --no_base
    passes 0 passes_480_tiny 480 "$model" "${tiny[@]}"
    passes 0 passes_480_tiny_float8 480 "$model" "${tiny[@]}" "${float8[@]}"
  } &
  cache=/tmp/hub720
  model=hf://Efficient-Large-Model/SANA-Video_2B_720p/checkpoints/SANA_Video_2B_720p.pth
  tiny=(--decoder taeltx_2 --decoder_path seeded:0)
  share 1 cache720 150 tests/full_size/hub_cache.py "$cache" --size 720
  passes 1 passes_720_tiny 720 "$model" "${tiny[@]}"
  passes 1 passes_720_tiny_float8 720 "$model" "${tiny[@]}" "${float8[@]}"
  passes 1 passes_720_full 720 "$model"
  wait
  ;;
many)
  gpus=$(nvidia-smi --list-gpus | wc -l)
  CUDA_VISIBLE_DEVICES=1 step cache720 150 "$python" tests/full_size/hub_cache.py /tmp/hub720 --size 720 &
  CUDA_VISIBLE_DEVICES=0 step cache 150 "$python" tests/full_size/hub_cache.py "$cache"
  together "${gpus}_full" 80
  together "${gpus}_tiny_float8" 70 "${tiny[@]}" "${float8[@]}"
  step training 200 "$python" tests/full_size/measure_training.py --cache "$cache" --out "$results/training.json" --save \
    --scratch /tmp self_forcing=5 longsana=8
  wait
  if ((gpus == 4)); then
    for gpu in 0 1 2 3; do
      share "$gpu" "viewers_$gpu" 150 tests/full_size/measure_load.py --cache "$cache" --out "$results/viewers_$gpu.json" \
        --only taew2_1 --seconds 60 &
    done
    wait
  fi
  cache=/tmp/hub720
  minute=(--config=configs/sana_video_config/Sana_2000M_720px_longsana.yaml "${film[@]}")
  minute+=(--model_path=hf://Efficient-Large-Model/SANA-Video_2B_720p/checkpoints/SANA_Video_2B_720p.pth)
  together "${gpus}_720p_full" 80
  ;;
*)
  echo "usage: OUT=folder bash tests/full_size/gpu.sh two|viewers|full|flat|passes|many" >&2
  exit 2
  ;;
esac
