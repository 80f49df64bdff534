{{- define "qerve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "qerve.environment" -}}
- name: QERVE_MODEL_NAME
  value: {{ .Values.artifact.modelName | quote }}
- name: QERVE_DRAIN_TIMEOUT_SECONDS
  value: {{ .Values.drainSeconds | quote }}
{{- if .Values.metrics.port }}
- name: QERVE_METRICS_PORT
  value: {{ .Values.metrics.port | quote }}
{{- end }}
{{- if .Values.gpu.enabled }}
- name: QERVE_DEVICE
  value: cuda
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
- name: QERVE_API_KEYS_FILE
  value: /run/secrets/qerve/keys
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: {{ printf "QERVE_%s" (upper $name) }}
  value: {{ include "qerve.text" $value | quote }}
{{- end }}
{{- end -}}

{{- define "qerve.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- $gpu := dict .Values.gpu.resourceName (include "qerve.text" .Values.gpu.count) -}}
{{- $resources = merge (dict "limits" $gpu) $resources -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "qerve.volumes" -}}
{{- $artifact := .Values.artifact -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ ternary "1Gi" "256Mi" .Values.gpu.enabled }}
- name: artifact
{{- if eq $artifact.source "persistentVolumeClaim" }}
  persistentVolumeClaim:
    claimName: {{ $artifact.persistentVolumeClaim.claimName }}
    readOnly: true
{{- else if eq $artifact.source "hostPath" }}
  hostPath:
    path: {{ $artifact.hostPath.path }}
    type: Directory
{{- else if eq $artifact.source "image" }}
  image:
    reference: {{ $artifact.image.reference }}
    pullPolicy: {{ .Values.image.pullPolicy }}
{{- else }}
  emptyDir:
    sizeLimit: {{ $artifact.initContainer.sizeLimit }}
{{- end }}
{{- with .Values.apiKeys }}
{{- if .existingSecret }}
- name: api-keys
  secret:
    secretName: {{ .existingSecret }}
    defaultMode: 0440
    items:
      - {key: {{ .key }}, path: keys}
{{- end }}
{{- end }}
{{- end -}}
