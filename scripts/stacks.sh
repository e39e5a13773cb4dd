# Sourced by `test`: the older stacks that the package promises to work beside, each in an environment of its own.
#
#   middle   transformers 4.57, TRL 1.0
#   oldest   transformers 4.49, TRL 0.15: the lower bounds of pyproject.toml, where VLM-R1 and its descendants live

stack_requirements() {
    case $1 in
        middle) echo "transformers==4.57.* trl==1.0.* torch torchvision peft accelerate" ;;
        oldest) echo "transformers==4.49.* trl==0.15.* torch torchvision peft==0.14.* accelerate==1.3.*" ;;
        *) fail "unknown stack $1: middle or oldest" ;;
    esac
}
