"""An answer that is sure to be JSON of one shape: start `tenfold serve`, then python examples/server_json.py [URL]"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{(sys.argv[1:] or ['http://127.0.0.1:8000'])[0]}/v1", api_key="none")

recipe = {
    "type": "object",
    "properties": {
        "dish": {"type": "string", "maxLength": 40},
        "minutes": {"type": "integer", "minimum": 1, "maximum": 600},
        "ingredients": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 2, "maxItems": 4},
    },
    "required": ["dish", "minutes", "ingredients"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Suggest a simple recipe with eggs."}],
    response_format={"type": "json_schema", "json_schema": {"name": "recipe", "schema": recipe, "strict": True}},
)
print(json.dumps(json.loads(answer.choices[0].message.content or ""), indent=2))
