{
  "targets": [
    {
      "target_name": "qlora_node",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "inputs": ["CMakeLists.txt"],
          "outputs": ["build/Release/qlora_node.node"],
          "action": ["npm", "run", "build:native"]
        }
      ]
    }
  ]
}
